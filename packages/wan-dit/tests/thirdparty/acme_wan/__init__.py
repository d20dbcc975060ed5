"""A VAE and a text encoder of another author, for the tests."""
