"""What a run tells: throughput, routing statistics, and where they are written."""
