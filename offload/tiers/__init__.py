"""Memory tiers: what holds the bytes of a unit, and the one object that moves them."""
