"""A folder that a run wrote, loaded in other tools and compared with the model that was in memory."""
