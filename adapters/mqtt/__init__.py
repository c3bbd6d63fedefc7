"""MQTT: frames and telemetry in; poses, events and snapshots out; commands."""
