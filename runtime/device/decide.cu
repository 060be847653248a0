// Algorithm 1 on the device: what a request's clock says, and what each row of each block does. One thread each: a
// guard has a handful of numbers. Compiled by NVRTC on the machine that runs it; plain C but for the three words below.

extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

// Fields of `clock`, which all branches of a request share, and of `own`, which is one branch's.
enum { STARTED, STEP, CALLS, DIRECTION, BROKE, LEFT, EPOCH, BANKS, TICK, VERDICT };
enum { OWN_EPOCH, OWN_BANKS, OWN_TICK, OWN_STEP, OWN_VERDICT };
enum { GOES_ON, NEW, IN_DOUBT };
enum { MOST = 16 };  // vectors of a Gram matrix
// Fields of `limits`.
enum { MAX_REUSE, WARMUP, KEEPS, SCHEDULED };
// Values of a decision: REUSE and, from COMPUTE on, the variants are bodies of the switch; SKIP is past the last of them,
// and so is, unsigned, UNPLANNED: a step that the schedule does not cover.
enum { UNPLANNED = -1, REUSE = 0, COMPUTE = 1, SKIP = 1000 };
enum { EMPTY = -1 };

// Squared length of the first vector of a Gram matrix (k, k) without its projection onto the next `n` - 1.
extern "C" __device__ double unexplained(const double* gram, int k, int n)
{
    double system[MOST][MOST + 1];
    int there[MOST], count = 0;
    for (int i = 1; i < n; ++i)
        if (gram[i * k + i] > 0) there[count++] = i;
    for (int i = 0; i < count; ++i) {
        double length = sqrt(gram[there[i] * k + there[i]]);
        for (int j = 0; j < count; ++j)
            system[i][j] = gram[there[i] * k + there[j]] / (length * sqrt(gram[there[j] * k + there[j]]));
        system[i][i] += 1e-6;
        system[i][count] = gram[there[i]] / length;
    }
    double explained = 0;
    for (int i = 0; i < count; ++i) {
        for (int row = i + 1; row < count; ++row) {
            double factor = system[row][i] / system[i][i];
            for (int j = i; j <= count; ++j) system[row][j] -= factor * system[i][j];
        }
        explained += system[i][count] * system[i][count] / system[i][i];
    }
    return gram[0] > explained ? gram[0] - explained : 0;
}

// Whether latents of the precision `eps` continue: runtime/requests/evidence.py.
extern "C" __device__ int continues(const double* gram, int k, double eps, int near)
{
    double moved = gram[0], own = gram[0] + 2 * gram[1] + gram[k + 1];
    if (moved == 0 || (near && moved <= 0.01 * own)) return 1;
    double unscaled = unexplained(gram, k, 2);
    return unscaled <= 4 * eps * eps * own || unexplained(gram, k, k) < 0.25 * unscaled;
}

// Brings the clock to the call at `time` (one per row, or one for all) of a branch: the rule is that of
// runtime/requests/rule.py. `grams` (rows, k, k) are those of its latents, none where nothing came before; `first` says
// whether they are those of the first call. `held` (cells) is emptied where the request began anew or is in doubt.
extern "C" __global__ void advance(
    const double* time, double* last, double* begun, int times, const double* grams, int rows, int k, const int* first,
    const double* eps, int renewed, int trusted, int* clock, int* own, int* held, int cells)
{
    int up = 0, down = 0, same = 1, on = 1;
    for (int row = 0; row < times; ++row) {
        up |= time[row] > last[row];
        down |= time[row] < last[row];
        same &= time[row] == begun[row];
    }
    int moved = up || down, apart = up && down, direction = apart ? 0 : up - down;
    int turned = apart || direction * clock[DIRECTION] < 0, twin = turned && !apart && !clock[BROKE];
    int seen = own[OWN_TICK] == clock[TICK], another = !moved && !seen;
    int near = !renewed && !turned && (moved || !seen);
    for (int row = 0; row < rows; ++row) on &= continues(grams + row * k * k, k, *eps, near);
    int again = rows && *first && (clock[LEFT] || (same && seen));
    if (rows && !*first) clock[LEFT] = 1;
    int verdict = GOES_ON, calls = clock[CALLS] + !another, broke = 0, certain = 1;
    if (!clock[STARTED] || again) verdict = NEW;
    else if (!((rows && on && !twin) || (!rows && another) || (trusted && !turned))) {
        certain = turned || !moved || renewed;
        broke = !certain;
        verdict = certain || (rows && !clock[BROKE]) ? NEW : IN_DOUBT;
    }
    if (verdict == NEW) {
        clock[STEP] = 0;
        clock[CALLS] = certain ? 0 : calls;
        clock[LEFT] = 0;
        clock[EPOCH] += clock[STARTED];
        for (int row = 0; row < times; ++row) begun[row] = time[row];
    } else {
        clock[STEP] = verdict == IN_DOUBT ? calls : clock[STEP] + !another;
        clock[CALLS] = calls;
    }
    if (verdict == NEW && certain) clock[DIRECTION] = 0;
    else if (moved) clock[DIRECTION] = direction;
    if (verdict == NEW || !another) clock[TICK] += 1;
    if (verdict != GOES_ON) clock[BANKS] += 1;
    clock[STARTED] = 1;
    clock[BROKE] = broke;
    clock[VERDICT] = verdict;
    for (int row = 0; row < times; ++row) last[row] = time[row];
    if (own[OWN_BANKS] != clock[BANKS])
        for (int cell = 0; cell < cells; ++cell) held[cell] = EMPTY;
    own[OWN_EPOCH] = clock[EPOCH];
    own[OWN_BANKS] = clock[BANKS];
    own[OWN_TICK] = clock[TICK];
    own[OWN_STEP] = clock[STEP];
    own[OWN_VERDICT] = verdict;
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
        if (done == REUSE && k == EMPTY) done = COMPUTE + widest;
    } else {
        int most = step < limits[WARMUP] ? 0 : limits[MAX_REUSE];
        done = gate < bounds[0] ? SKIP : gate <= bounds[1] && k >= 0 && k < most ? REUSE : COMPUTE + width;
    }
    if (done == REUSE) held[place] = k + 1;
    else if (done >= COMPUTE && done != SKIP) held[place] = limits[KEEPS] ? 0 : EMPTY;
    *decision = done;
    cudaGraphSetConditional(handle, done);
}
