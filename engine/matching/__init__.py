"""Which keyframes are matched with which, and what their matches become."""
