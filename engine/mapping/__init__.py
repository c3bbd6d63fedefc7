"""The growing map: from keyframes with verified pairs to a bundle-adjusted COLMAP model."""
