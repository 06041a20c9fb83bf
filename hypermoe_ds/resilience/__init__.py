"""Detect and survive faults: heartbeats, watchdog, step status, replicas, loss spikes, stop signals."""
