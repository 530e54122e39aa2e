"""What several tests use: tiny models, pages of the documentation, stand-ins for services. No test is in here."""
