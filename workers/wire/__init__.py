"""Messages and transports between processes: protobuf over gRPC. No pickle."""
