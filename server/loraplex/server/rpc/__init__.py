"""gRPC servicers and interceptors: proto to domain and back, nothing else."""
