# page
ktmoe info
ktmoe generate --prompt "And God said, Let there be light" --tokens 8 --temperature 0
ktmoe generate --tokens 8 --method AMXINT4
# end
