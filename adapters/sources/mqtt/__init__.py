"""Frames and positions that cameras publish on an MQTT broker."""
