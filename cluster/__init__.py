"""The only room with Ray: app builders, deployments, ingress, metrics."""
