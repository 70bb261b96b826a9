"""What all reports are made of: one HTML page that needs nothing else, and no network."""
