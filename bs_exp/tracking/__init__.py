"""Tracking: services to which a run is logged besides its record. One file per service."""
