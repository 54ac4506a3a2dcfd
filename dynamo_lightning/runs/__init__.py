"""Run folders: what is checked before a run starts, who may write into a folder, and how a stopped run goes on."""
