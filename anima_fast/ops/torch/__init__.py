"""Ops in plain torch: any device, no compiler."""
