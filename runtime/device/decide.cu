// Algorithm 1 on the device: what a request's clock says, and what each row of each block does. One thread each: a
// guard has a handful of numbers. Compiled by NVRTC on the machine that runs it; plain C but for the three words below.

extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

// Fields of `clock`, which all contexts of a request share, and of `own`, which is one context's.
enum { STARTED, STEP, DIRECTION, EPOCH, TICK, UNTOLD };
enum { OWN_EPOCH, OWN_TICK, OWN_STEP, OWN_UNTOLD };
// Fields of `limits`.
enum { MAX_REUSE, WARMUP, KEEPS, SCHEDULED };
// Values of a decision: REUSE and, from COMPUTE on, the variants are bodies of the switch; SKIP is past the last of them,
// and so is, unsigned, UNPLANNED: a step that the schedule does not cover.
enum { UNPLANNED = -1, REUSE = 0, COMPUTE = 1, SKIP = 1000 };
enum { EMPTY = -1 };

// Brings the clock to the call at `time` (one per row, or one for all). A new request starts where the timestep turns
// back, or where a context is called again at the same timestep. Without a context (`named` is 0) that is more likely
// another branch of guidance: then the request goes on, but from then on nothing is reused. `held` (cells) is emptied
// where a request started, and where branches cannot be told apart.
extern "C" __global__ void advance(
    const double* time, double* last, int rows, int named, int* clock, int* own, int* held, int cells)
{
    int up = 0, down = 0;
    for (int row = 0; row < rows; ++row) {
        up |= time[row] > last[row];
        down |= time[row] < last[row];
    }
    int moved = up || down;
    if (clock[STARTED]) {
        int again = !moved && own[OWN_TICK] == clock[TICK];
        int turned = (up && down) || (up && clock[DIRECTION] < 0) || (down && clock[DIRECTION] > 0);
        if (again && !named) clock[UNTOLD] = 1;
        if ((again && named) || turned) {
            clock[STARTED] = 0;
            clock[EPOCH] += 1;
        }
    }
    if (!clock[STARTED]) {
        clock[STEP] = 0;
        clock[DIRECTION] = 0;
        clock[TICK] += 1;
    } else if (moved) {
        clock[STEP] += 1;
        clock[DIRECTION] = up ? 1 : -1;
        clock[TICK] += 1;
    }
    clock[STARTED] = 1;
    for (int row = 0; row < rows; ++row) last[row] = time[row];
    if (own[OWN_EPOCH] != clock[EPOCH] || own[OWN_UNTOLD] != clock[UNTOLD])
        for (int cell = 0; cell < cells; ++cell) held[cell] = EMPTY;
    own[OWN_EPOCH] = clock[EPOCH];
    own[OWN_TICK] = clock[TICK];
    own[OWN_STEP] = clock[STEP];
    own[OWN_UNTOLD] = clock[UNTOLD];
}

// Decides for one row of one block and sets its switch. `logits`: the gate's, then one for each of `widths` widths, of
// which `variants` says which variant of the block's plan is run; no router (widths 0) is an open gate and the widest
// variant. `bounds`: tau, tau + margin. `table`: decisions given in advance, (steps, blocks, rows), which
// `place` = block * rows + row indexes within a step of `cells`. Updates the row's `held` and writes down the `decision`.
extern "C" __global__ void decide(
    unsigned long long handle, const double* logits, int widths, const int* variants, int widest, const double* bounds,
    const int* limits, const int* table, int steps, int cells, int place, const int* own, int* held, double* decision)
{
    double gate = 1.0;
    int width = widest;
    if (widths > 0) {
        gate = 1.0 / (1.0 + exp(-logits[0]));
        int best = 1;
        for (int choice = 2; choice <= widths; ++choice)
            if (logits[choice] > logits[best]) best = choice;
        width = variants[best - 1];
    }
    int step = own[OWN_STEP], k = held[place], done;
    if (limits[SCHEDULED]) {
        done = step < steps ? table[step * cells + place] : UNPLANNED;
        if (done == REUSE && (k == EMPTY || own[OWN_UNTOLD])) done = COMPUTE + widest;
    } else {
        int most = own[OWN_UNTOLD] || step < limits[WARMUP] ? 0 : limits[MAX_REUSE];
        done = gate < bounds[0] ? SKIP : gate <= bounds[1] && k >= 0 && k < most ? REUSE : COMPUTE + width;
    }
    if (done == REUSE) held[place] = k + 1;
    else if (done >= COMPUTE && done != SKIP) held[place] = limits[KEEPS] ? 0 : EMPTY;
    *decision = done;
    cudaGraphSetConditional(handle, done);
}
