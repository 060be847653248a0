// Algorithm 1 on the device: what a request's clock says, and what each row of each block does. One thread each: a
// guard has a handful of numbers. Compiled by NVRTC on the machine that runs it; plain C but for the three words below.

extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

// Fields of `clock`, which all branches of a request share, and of `own`, which is one branch's.
enum { STARTED, STEP, CALLS, DIRECTION, BROKE, LEFT, SPLIT, DOUBTS, EPOCH, BANKS, TICK, VERDICT };
enum { OWN_EPOCH, OWN_BANKS, OWN_TICK, OWN_STEP, OWN_VERDICT };
enum { GOES_ON, NEW, IN_DOUBT };
enum { MOST = 16 };  // vectors of a Gram matrix
enum { LAST = 2 };   // the last output among them
// What is `told` of a call: its conditioning is another generation's, all in new tensors, made anew; it has a name.
enum { RENEWED = 1, FRESH = 2, ANEW = 4, TRUSTED = 8 };
// Fields of `limits`.
enum { MAX_REUSE, WARMUP, KEEPS, SCHEDULED };
// Values of a decision: REUSE and, from COMPUTE on, the variants are bodies of the switch; SKIP is past the last of them,
// and so is, unsigned, UNPLANNED: a step that the schedule does not cover.
enum { UNPLANNED = -1, REUSE = 0, COMPUTE = 1, SKIP = 1000 };
enum { EMPTY = -1 };

// Squared length of the first vector of a Gram matrix (k, k) without its projection onto all others but `skipped`.
extern "C" __device__ double unexplained(const double* gram, int k, int skipped)
{
    double system[MOST][MOST + 1];
    int there[MOST], count = 0;
    for (int i = 1; i < k; ++i)
        if (gram[i * k + i] > 0 && i != skipped) there[count++] = i;
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
    return gram[0] <= explained ? 0 : gram[0] - explained;  // what is not a number stays so
}

// Whether latents of the precision `eps` continue: runtime/requests/evidence.py.
extern "C" __device__ int continues(const double* gram, int k, double eps, int near, int strict, int repeated)
{
    double moved = gram[0], own = gram[0] + 2 * gram[1] + gram[k + 1], rounding = 4 * eps * eps * own;
    if (moved <= 4 * rounding) return 1;
    double unscaled = moved - (gram[k + 1] > 0 ? gram[1] * gram[1] / gram[k + 1] : 0);
    double left = unexplained(gram, k, -1), before = unscaled;
    if (unscaled <= 1e-4 * moved) return 0;
    if (near && moved <= 0.01 * own) return 1;
    if (repeated) {
        double earlier = unexplained(gram, k, LAST);
        before = earlier < before ? earlier : before;
    }
    if (strict) return before > 4 * rounding && left <= 0.01 * before + rounding;
    return left < 0.25 * before;
}

// Brings the clock to the call at `time` (one per row, or one for all) of a branch: the rule is that of
// runtime/requests/rule.py. `grams` (rows, k, k) are those of its latents, none where nothing came before; `first` says
// whether they are those of the first call, `astray` whether rows changed places. `held` (cells) is emptied where the
// request began anew or is in doubt.
extern "C" __global__ void advance(
    const double* time, double* last, double* begun, int times, const double* grams, int rows, int k, const int* first,
    const int* astray, const double* eps, int told, int* clock, int* own, int* held, int cells)
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
    int strict = told & FRESH || clock[SPLIT] || clock[DOUBTS] > 0, trusted = told & TRUSTED && !turned;
    int near = !(told & RENEWED) && !turned && (moved || !seen) && !strict;
    for (int row = 0; row < rows; ++row) on &= continues(grams + row * k * k, k, *eps, near, strict, seen && !moved);
    int broken = told & ANEW && !(told & TRUSTED), compared = rows || broken;
    int again = rows && *first && (clock[LEFT] || (same && seen));
    if (rows && !*first) clock[LEFT] = 1;
    int verdict = GOES_ON, broke = 0, certain = 1, steps = !another, calls = clock[CALLS] + steps;
    if (!clock[STARTED] || again) verdict = NEW;
    else if (trusted && (clock[SPLIT] || (!moved && seen && compared && !on))) {
        verdict = IN_DOUBT;
        clock[SPLIT] = 1;
        if (!moved) steps = 0;
    } else if ((compared && on && !broken && !twin) || (!compared && (another || trusted))) verdict = GOES_ON;
    else if (trusted) verdict = seen && *astray ? IN_DOUBT : GOES_ON;
    else {
        certain = turned || !moved || told & RENEWED;
        broke = !certain;
        verdict = certain || (compared && !clock[BROKE]) ? NEW : IN_DOUBT;
    }
    if (verdict == NEW) {
        clock[STEP] = 0;
        clock[CALLS] = certain ? 0 : calls;
        clock[LEFT] = clock[SPLIT] = 0;
        if (certain) clock[DOUBTS] = clock[STARTED] && !moved ? 2 : 0;
        clock[EPOCH] += clock[STARTED];
        for (int row = 0; row < times; ++row) begun[row] = time[row];
    } else {
        clock[STEP] = broke ? calls : clock[STEP] + steps;
        clock[CALLS] += steps;
        if (moved && !apart && clock[DOUBTS] > 0) clock[DOUBTS] -= 1;
    }
    if (verdict == NEW && certain) clock[DIRECTION] = 0;
    else if (moved) clock[DIRECTION] = direction;
    if (verdict != GOES_ON || steps) clock[TICK] += 1;
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
