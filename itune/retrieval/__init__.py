"""Build the datastores that captions are retrieved from."""
