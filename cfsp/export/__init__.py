"""A folder that a run wrote, in the forms that other tools load: one module for each form."""
