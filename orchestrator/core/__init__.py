"""The pure core: functions over frozen values, with no torch, ray, clock or environment."""
