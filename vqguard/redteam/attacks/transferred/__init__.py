"""A picture that is made on other models, for many requests at once."""
