for _ in $(seq 60); do echo "And God saw the light, that it was good."; done > text.txt
# page
ktmoe finetune --text text.txt --out adapter --steps 2 --batch 2 --window 32 --every 1
ktmoe generate --adapter adapter --tokens 8
# end
