"""What looks after a federation: certificates, egress reports, tracking servers, and runs of other tools."""
