"""The machine: processes, files, the terminal, certificates, and which FaceFed runs here."""
