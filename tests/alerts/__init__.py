"""What Prometheus is to do with our rules, as `promtool test rules` reads it, and what holds of every rule."""
