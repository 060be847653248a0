"""Campaigns that try to break what is promised of bundles; `make torture` runs all of them."""
