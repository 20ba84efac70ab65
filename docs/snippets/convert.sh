# page
ktmoe convert "$model" experts-int4 --method AMXINT4
ktmoe verify experts-int4 --layer 0 --check-seconds 1 --seconds 0.1
ktmoe generate experts-int4 --tokens 8
# end
