"""Pictures of the dashboards, drawn by matplotlib of what a real Prometheus says of a fleet that lives."""
