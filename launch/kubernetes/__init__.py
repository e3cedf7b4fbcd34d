"""A run on a Kubernetes cluster with the KubeRay operator: manifests, what is wrong with them, and kubectl.

Imports go one way: yaml_text, pods, manifests, reasons; schemas, then the rules (pod_rules, cluster_rules, job_rules),
then validation; kubectl; commands. Nothing here is imported before ``groundswell k8s`` is called.
"""
