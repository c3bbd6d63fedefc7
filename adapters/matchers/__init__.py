"""What describes keyframes and matches pairs."""
