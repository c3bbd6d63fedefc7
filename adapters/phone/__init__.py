"""A phone's browser as a camera, and the page that shows the map to the person who holds it."""
