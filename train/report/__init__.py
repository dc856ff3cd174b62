"""A run as people look at it: pictures, and one page."""
