"""MQTT: frames and telemetry in; poses, facts and snapshots out; commands."""
