"""Depth maps of keyframes, fused into dense points; knows no map."""
