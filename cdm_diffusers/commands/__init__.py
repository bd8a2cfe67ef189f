"""The command `cdm`: what it is called with, and the commands that belong to no other room."""
