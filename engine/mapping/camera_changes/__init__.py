"""Other lenses, zoom levels and crops, each tried as a map."""
