"""MASt3R: dense matching of image pairs by a network (Leroy, Cabon and Revaud, ECCV 2024)."""
