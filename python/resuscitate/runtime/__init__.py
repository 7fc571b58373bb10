"""What a run is carried by: its options, ranks, memory, threads and journal."""
