"""Find and check the hosts of a job, and supervise the job."""
