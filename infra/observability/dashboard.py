"""Writes the Grafana dashboard: `python infra/observability/dashboard.py`. Panels are a table here, JSON there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "grafana" / "dashboards" / "tmad.json"

RUN = 'run=~"$run"'

PANELS: list[tuple[str, list[tuple[str, str, str, str]]]] = [
    (
        "Training",
        [
            ("Images/s", f'ray_tmad_rate{{name="images_per_s",{RUN}}}', "{{run}}", "short"),
            (
                "Share of time waiting for data",
                f'ray_tmad_rate{{name="data_wait_share",{RUN}}}',
                "{{run}}",
                "percentunit",
            ),
            ("Images trained on", f'ray_tmad_training{{name="images",{RUN}}}', "{{run}}", "short"),
            ("Losses", f"ray_tmad_loss{{{RUN}}}", "{{name}}, {{run}}", "short"),
            ("Gradient norms", f"ray_tmad_grad_norm{{{RUN}}}", "{{name}}, {{run}}", "short"),
            ("Validation", f"ray_tmad_val{{{RUN}}}", "{{name}}, {{run}}", "short"),
        ],
    ),
    (
        "What went wrong",
        [
            ("Steps skipped (not finite)", f'ray_tmad_training{{name="bad_steps",{RUN}}}', "{{run}}", "short"),
            ("Rollbacks, damaged checkpoints", f"ray_tmad_health{{{RUN}}}", "{{name}}, {{run}}", "short"),
            ("Retries and restarts", "sum by (event) (ray_tmad_events_total)", "{{event}}", "short"),
            ("Images that could not be used", f"ray_tmad_data{{{RUN}}}", "{{name}}, {{run}}", "short"),
        ],
    ),
    (
        "Preparation",
        [
            ("Images/s", 'ray_tmad_prepare{name="images_per_s"}', "{{run}}", "short"),
            (
                "Done",
                'ray_tmad_prepare{name="images"} / on(run) group_left ray_tmad_prepare{name="of"}',
                "{{run}}",
                "percentunit",
            ),
            ("Left out (quarantine)", 'ray_tmad_prepare{name="left_out"}', "{{run}}", "short"),
        ],
    ),
    (
        "Service",
        [
            ("Pictures/s", 'sum(rate(ray_tmad_events_total{event="filled"}[5m]))', "filled", "short"),
            ("Refused", 'sum by (event) (rate(ray_tmad_events_total{event=~"refused_.*"}[5m]))', "{{event}}", "short"),
            (
                "Seconds in a replica, 95 %",
                "histogram_quantile(0.95, sum by (le) (rate("
                'ray_serve_deployment_processing_latency_ms_bucket{deployment="model"}[5m]))) / 1000',
                "95 %",
                "s",
            ),
            ("Waiting", 'sum(ray_serve_deployment_queued_queries{deployment="model"})', "waiting", "short"),
            ("Replicas", 'sum(ray_serve_deployment_replica_healthy{deployment="model"})', "well", "short"),
            (
                "Pictures in a batch",
                "sum(rate(ray_serve_actual_batch_size_sum[5m])) / sum(rate(ray_serve_actual_batch_size_count[5m]))",
                "mean",
                "short",
            ),
        ],
    ),
    (
        "Machines",
        [
            (
                "Most GPU memory of the first worker",
                f'ray_tmad_system{{name="gpu_memory_gb",{RUN}}} * 1e9',
                "{{run}}",
                "bytes",
            ),
            ("GPU memory of the nodes", "ray_node_gram_used * 1024 * 1024", "{{instance}} {{GpuIndex}}", "bytes"),
            ("GPU use", "ray_node_gpus_utilization / 100", "{{instance}} {{GpuIndex}}", "percentunit"),
            ("Memory of the nodes", "ray_node_mem_used / ray_node_mem_total", "{{instance}}", "percentunit"),
            ("Processors of the nodes", "ray_node_cpu_utilization / 100", "{{instance}}", "percentunit"),
            ("Object store", "sum by (Location) (ray_object_store_memory)", "{{Location}}", "bytes"),
        ],
    ),
]
"""Row, then (title, PromQL, legend, unit)."""


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in PANELS:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}}
        )
        y += 1
        for number, (title, expression, legend, unit) in enumerate(members):
            place = {"h": 8, "w": 8, "x": 8 * (number % 3), "y": y + 8 * (number // 3)}
            panels.append(
                {
                    "id": len(panels) + 1,
                    "type": "timeseries",
                    "title": title,
                    "datasource": {"type": "prometheus", "uid": "prometheus"},
                    "gridPos": place,
                    "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                    "targets": [{"refId": "A", "expr": expression, "legendFormat": legend}],
                }
            )
        y += 8 * -(-len(members) // 3)
    run = {
        "name": "run",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "prometheus"},
        "query": "label_values(ray_tmad_rate, run)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": "tmad",
        "title": "T-MAD",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [run]},
        "panels": panels,
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
