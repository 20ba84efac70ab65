"""What all benches use: shapes, methods, child processes, measurement, records."""
