"""Dashboards for Grafana, as code: `panels` has the vocabulary, `boards` the dashboards, `build` makes their JSON."""
