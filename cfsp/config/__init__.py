"""Configuration: schema, composition, components by ``_target_``, and run identity."""
