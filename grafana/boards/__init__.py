"""The dashboards, one a module."""

from grafana.boards import clients, overview, rules, services, store

DASHBOARDS = (overview.DASHBOARD, rules.DASHBOARD, services.DASHBOARD, store.DASHBOARD, clients.DASHBOARD)
