"""From headers alone: what a run writes, holds in memory and costs, or a refusal."""
