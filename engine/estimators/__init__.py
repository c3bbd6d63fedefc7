"""Estimators: two-view geometry and absolute pose from matched points; adjustment options."""
