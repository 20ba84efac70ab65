# needs: mpi4py
for _ in $(seq 60); do echo "And God said, Let there be light"; done > text.txt
# page
mpiexec -n 2 --bind-to none python -m mpi4py program.py
mpiexec -n 2 --bind-to none python -m mpi4py -m ktmoe_np.cli finetune --text text.txt --out adapter --steps 2
# end
