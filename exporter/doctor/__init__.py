"""Why few drafts are accepted: experiments for each known cause."""
