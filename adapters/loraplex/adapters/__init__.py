"""Everything about adapters that needs neither gRPC nor the engine."""
