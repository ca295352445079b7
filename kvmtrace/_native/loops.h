/* SPDX-License-Identifier: MIT
 *
 * The compiled loops: every function that Python calls, declared once. The C files include this header and cffi reads
 * it (compiling.py), so a prototype that does not fit its function or its caller fails when it is compiled or called.
 *
 * Nothing here trusts what it is given of a file: every index is held inside its buffer. Where an argument has n
 * elements it says so; arrays do not overlap.
 */
#ifndef KVMTRACE_LOOPS_H
#define KVMTRACE_LOOPS_H

#include <stddef.h>
#include <stdint.h>

/* A file or buffer as little-endian u32. */
typedef struct {
	const uint32_t *words;
	int64_t n_words;
} Words;

/* Columns of records to be filled in. start: word index of each record's data, uint32 or (wide) int64. The last four
 * are NULL where the common fields are not wanted.
 */
typedef struct {
	int64_t n_rows;
	int32_t wide;
	void *start;
	uint64_t *ts;
	uint16_t *kind;
	uint8_t *flags;
	uint8_t *preempt;
	int32_t *tid;
} Columns;

/* ring_records.c: pages of ftrace's ring buffer */

/* Count the data records of pages, and find those whose records do not fit: of page `damaged[i]` the record at word
 * `damage_at[i]` would end at word `damage_stop[i]`, behind the page's last; `end` of that page is set to where reading
 * must end. Returns the number of damaged pages. All arrays: n_pages.
 */
int64_t count_records(Words buffer, const int64_t *first, int64_t *end, int64_t n_pages, int64_t *counts,
		      int64_t *damaged, int64_t *damage_at, int64_t *damage_stop);

/* Fill in the data records of pages that count_records has been through (`end` is what it left). kind_of_id: 65,536.
 * Returns how many there are, more than out->n_rows if more than were counted: the file has been changed meanwhile.
 */
int64_t fill_records(Words buffer, const int64_t *first, const int64_t *end, const uint64_t *page_ts, int64_t n_pages,
		     const uint16_t *kind_of_id, const Columns *out);

/* perf_samples.c: records of a perf.data */

/* Where the parts of a sample are, in u64 words from its header; chain and cpu -1 if absent. */
typedef struct {
	int64_t time, cpu, raw, chain;
} Layout;

/* The layouts of samples, and which has which. n_layouts 0: none count. n_ids 0: all have the first. Otherwise a
 * sample begins with an identifier, one of n_ids ascending ones or none that counts: sample `id` has the layout
 * `layout_of_id`. Where the identifiers lie close together, table[id - ids[0]] is the number of its layout from 1 (0:
 * it does not count), table_size long; 0: they are looked for in `ids`.
 */
typedef struct {
	const Layout *layouts;
	int64_t n_layouts;
	const uint64_t *ids;
	const int32_t *layout_of_id;
	int64_t n_ids;
	const uint16_t *table;
	int64_t table_size;
} Samples;

/* Return where the records end that stand one behind the other from word 0 on: at n_words, or at an impossible one. */
int64_t end_of_perf_records(const uint64_t *words, int64_t n_words);

/* Records that begin in words at..last and end at `end` at the latest; n_others: there is room for so many of those
 * that are no samples. Afterwards `at` is where the walk ended, before `last` only at an impossible record, and n_others
 * how many there were.
 */
typedef struct {
	int64_t at, last, end, n_others;
} PerfSpan;

/* Fill in the samples of a span and the positions of its other records. kind_of_id: 65,536. Returns how many samples
 * count and hold raw data, -1 where there is no room for all.
 */
int64_t read_perf_records(const uint64_t *words, int64_t n_words, PerfSpan *span, const Samples *samples,
			  const uint16_t *kind_of_id, const Columns *out, int16_t *cpu, int64_t *others);

/* perf_copies.c: samples that perf wrote twice */

/* Rows, and their order by time (n_rows of them). start: as of Columns. */
typedef struct {
	int64_t n_rows;
	const int64_t *order;
	int32_t wide;
	const void *start;
	const int64_t *ts;
	const int16_t *cpu;
	const int32_t *tid;
	const uint16_t *kind;
} TimedRows;

/* Mark in `copy`, in the order of times, the rows that hold what an earlier one of their CPU, time, thread and kind
 * holds, rows of kind `lost` left out. slots, moments: n_slots zeros each (a power of two above the number of rows that share their time with the
 * one before or behind). Returns how many copies there are, -1 where there are too few slots or an index is none of n_rows; *n_same: how many rows
 * have the time of an earlier one of their CPU.
 */
int64_t mark_copies(Words buffer, const TimedRows *rows, int32_t lost, uint64_t seed, int64_t *slots, int64_t *moments,
		    int64_t n_slots, uint8_t *copy, int64_t *n_same);

/* field_bytes.c: fields of many records */

/* Copy `size` bytes at byte `start * unit + offset` of each of n records. starts: uint32 or (wide) int64. Beyond the
 * buffer's end its last word repeats (`by_word`: fields of whole words at a multiple of 4) or its last byte. The buffer
 * is not empty.
 */
void gather_bytes(Words buffer, const void *starts, int32_t wide, int64_t n, int64_t unit, int64_t offset, int64_t size,
		  int32_t by_word, uint8_t *out);

/* A field of records: `size` bytes at byte `offset` of each; out: n times as many. by_word: as of gather_bytes. */
typedef struct {
	int64_t offset, size;
	int32_t by_word;
	uint8_t *out;
} FieldPlace;

/* Do what gather_bytes does for several fields, so that each record is looked at once; starts are in words. */
void gather_fields(Words buffer, const void *starts, int32_t wide, int64_t n, const FieldPlace *fields, int64_t n_fields);

/* thread_rows.c: which rows belong together */

/* Count the events of threads `tids` (ascending) that the model tracks (class > 0): per thread in `counts`. Returns
 * how many events of these threads there are, tracked or not. `number` keeps each row's thread, from 1; 0: none.
 */
int64_t count_tracked(const int32_t *tid, const uint8_t *cls, int64_t n, const int32_t *tids, int64_t n_tids,
		      uint16_t *number, int64_t *counts);

/* Put the tracked events in order of thread, recorded order within a thread. `next` holds where each thread begins
 * and is used up.
 */
void fill_tracked(const uint16_t *number, const uint8_t *cls, const int64_t *ts, const int16_t *cpu, int64_t n,
		  int64_t *next, int64_t *row_out, uint8_t *cls_out, uint16_t *thread_out, int64_t *ts_out,
		  int16_t *cpu_out);

/* Sort rows by their kind: `order` has the rows of kind 0, of kind 1 ..., each ascending, from `begin[kind]` on
 * (n_kinds + 1 numbers), `position` the place of each row within its kind. Returns -1 if a kind is none of n_kinds.
 */
int64_t rows_by_kind(const uint16_t *kind, int64_t n, int64_t n_kinds, int64_t *begin, int64_t *order,
		     int64_t *position);

/* For each row, the latest row of its thread up to itself that is wanted, or -1; threads stand one behind the other. */
void latest_wanted(const uint8_t *wanted, const uint16_t *thread, int64_t n, int32_t *latest);

/* Mark the rows, but the first, whose value of `size` bytes differs from the one before; marks stay. */
void mark_changes(const uint8_t *values, int64_t n, int64_t size, uint8_t *changed);

/* class_positions.c: the events of a sequence by class */

/* Sort positions by class (below 64): `order` has those of class 0, of class 1 ..., each ascending, from `begin[class]`
 * on (65 numbers).
 */
void positions_by_class(const uint8_t *cls, int64_t n, int64_t *begin, int64_t *order);

/* Give each segment the first of n ascending positions that lies in it, or -1, and how many do. of: n_events, the
 * segment of each event. Returns -1 if a position is none of n_events, or a number none of n_segments.
 */
int64_t first_in_segments(const int64_t *of, int64_t n_events, const int64_t *positions, int64_t n, int64_t n_segments,
			  int64_t *first, int64_t *count);

/* Copy the values of `size` bytes that stand in a column at place[positions[i]]. Returns -1 if a position is none of
 * n_places, or a place none of n_column.
 */
int64_t take_values(const uint8_t *column, int64_t n_column, int64_t size, const int64_t *place, int64_t n_places,
		    const int64_t *positions, int64_t n, uint8_t *out);

/* Return the place of the first of n positions where the places of all follow each other, else -1. */
int64_t consecutive_places(const int64_t *place, int64_t n_places, const int64_t *positions, int64_t n);

/* For each event of a sequence that is looked at in another order, the latest one so far whose class is at most n_steps
 * (-1: none), as an index into `order`, and how often knowledge broke off so far. Returns -1 if an index is none of n.
 */
int64_t steps_and_breaks(const uint8_t *cls, const uint8_t *broken, const int64_t *order, int64_t n, int64_t n_steps,
			 int64_t *latest, int64_t *breaks);

/* For each segment, the next one of kind `entry` behind it that is linked to it over segments neither of kind `exit` nor
 * 0; -1 for none.
 */
void next_entries(const uint8_t *kind, const uint8_t *linked, int64_t n, int32_t entry, int32_t exit, int64_t *next);

/* parquet_footer.c: the footer of a Parquet file */

/* Of each column chunk of each row group, as {codec, bytes in the file, offset of the first data page, offset of the
 * dictionary page}, -1 for what is not told. Returns -1 if the footer is none, or not of so many row groups and columns.
 */
int64_t read_column_chunks(const uint8_t *footer, int64_t n_bytes, int64_t n_groups, int64_t n_columns, int64_t *chunks);

/* key_numbers.c: dense numbers for sparse keys */

/* A table of n_slots (a power of two) slots: a key each and its number from 1; 0: the slot is empty. known: n_slots / 2
 * keys, by number.
 */
typedef struct {
	uint64_t *key;
	int32_t *number;
	int64_t n_slots;
	uint64_t *known;
} KeyTable;

/* Give each key its number from 0; keys that are new get the next ones (*n_known of them are known). Returns how many
 * keys were numbered: fewer than n where the table is half full and a new key comes.
 */
int64_t number_keys(const uint64_t *keys, int64_t n, uint64_t seed, const KeyTable *table, int64_t *n_known,
		    int32_t *number);

/* lane_rows.c: what vCPU threads did, from step to step */

/* The numbers of threads, from 1, by thread id (n_numbers). marks: bit s is set where only a vCPU thread makes step s. */
typedef struct {
	const int32_t *number;
	int64_t n_numbers;
	uint32_t marks;
} ThreadNumbers;

/* Rows of a table. step: below 32, 0 for rows that are none. switches: for each of the first n_switches rows of kind
 * `switch_kind`, the thread that is switched in; NULL: nothing is known of that. first_row: of the recording.
 */
typedef struct {
	int64_t n_rows;
	const int32_t *tid;
	const uint16_t *kind;
	const uint8_t *step;
	const int64_t *ts, *arg;
	const int16_t *cpu;
	const int32_t *loss;
	const int32_t *switches;
	int64_t n_switches;
	int32_t switch_kind;
	int64_t first_row;
} LaneSource;

/* Columns of lanes to be filled in; row: NULL where it is not wanted. */
typedef struct {
	int64_t n_rows;
	uint16_t *thread;
	uint8_t *step;
	int64_t *ts, *arg;
	int16_t *cpu;
	int32_t *loss;
	int64_t *row;
} LaneColumns;

/* Count the rows of lanes that a table gives; *n_new: marked rows of threads that have no number yet. */
int64_t count_lane_rows(const LaneSource *from, const ThreadNumbers *threads, int64_t *n_new);

/* Fill in the rows of lanes, in the order of the table; a thread that is switched in makes the step `resume`. Returns
 * how many there are, -1 if more than there is room for.
 */
int64_t fill_lane_rows(const LaneSource *from, const ThreadNumbers *threads, int32_t resume, const LaneColumns *out);

/* How long it took from each row to the next of its thread, whose rows stand one behind the other; 0 for a thread's last.
 * latest: of each thread, the latest time so far; where time steps back it stands still.
 */
void step_durations(const uint16_t *thread, const int64_t *ts, int64_t n, int64_t *latest, int64_t *dur_ns);

/* Rows of lanes, those of a thread one behind the other. */
typedef struct {
	int64_t n_rows;
	const uint16_t *thread;
	const uint8_t *step, *suspect;
} LaneView;

/* What steps are called, which part of its time a thread spends after each (`keeps`: as before), and parts. */
typedef struct {
	uint8_t after[32];
	uint8_t entry, exit, userspace_exit, ret, wrap_in, wrap_out, block, preempt;
	uint8_t keeps, guest, entry_exit, handler, blocked, preempted, unknown;
} LaneSteps;

/* Say what each row's thread does until its next row, and which row is its latest entry or exit up to it, -1 for none.
 * At most 2^31 - 1 rows.
 */
void sweep_lanes(const LaneView *lanes, const LaneSteps *steps, uint8_t *part, int32_t *owner);

/* Add weights (NULL: 1 each) to the sums of their numbers, int32 or (wide) int64, within [-limit, limit]. Returns -1 if
 * a number is none of n_sums.
 */
int64_t sum_by_number(const void *numbers, int32_t wide, const int64_t *weights, int64_t n, int64_t n_sums,
		      int64_t limit, int64_t *sums);

/* Sums of time by group and part, within [-limit, limit]. */
typedef struct {
	int64_t n_parts, n_groups, limit;
	int64_t *sums;
} PartTotals;

/* Add the times of n rows to the sums of their part and group: that of the row itself or (owner) of the row that it
 * belongs to, -1 for none. Returns -1 if a number is none of those.
 */
int64_t sum_parts(const uint8_t *part, const int64_t *dur_ns, int64_t n, const int32_t *owner, const int32_t *group,
		  const PartTotals *totals);

/* edges.c: the VM-entries and VM-exits of lanes, paired */

/* Rows of lanes, those of a thread one behind the other. */
typedef struct {
	int64_t n_rows;
	const uint16_t *thread;
	const uint8_t *step, *suspect;
	const int64_t *ts, *arg;
} EdgeSource;

/* Columns of edges to be filled in: n_edges each, those of what lies between two of them one less. */
typedef struct {
	int64_t n_edges;
	int64_t *edge, *reason, *dur_ns;
	uint8_t *is_exit, *handling, *guest, *sound;
} EdgeColumns;

/* Find the rows whose step is at most `exit`, and what lies between each and the next: a VM-exit being handled, or the
 * guest running; how long; and whether nothing can be lost in it. Returns how many there are, -1 if more than there is
 * room for.
 */
int64_t pair_edges(const EdgeSource *from, uint8_t exit, int64_t reason_mask, const EdgeColumns *out);

typedef struct {
	int64_t n_edges;
	const int64_t *edge, *reason, *dur_ns;
	const uint8_t *is_exit, *handling, *guest, *sound;
} EdgeView;

/* Sums by reason, within [-limit, limit], and room for n_edges samples. */
typedef struct {
	int64_t n_reasons, limit;
	int64_t *count, *guest_ns, *group, *dur_ns;
} ExitSums;

/* Count VM-exits and the time in guest mode before them by reason; keep the sound pairs of a VM-exit and a VM-entry.
 * Returns how many there are, -1 if a reason is none of n_reasons; discarded: those that are not sound are added to it.
 */
int64_t sum_exits(const EdgeView *edges, const ExitSums *sums, int64_t *discarded);

/* Rows of lanes: what the thread did from each to its next, and how long. waiting: bits of the parts that are waiting. */
typedef struct {
	int64_t n_rows;
	const uint16_t *thread;
	const uint8_t *part;
	const int64_t *dur_ns;
	uint32_t waiting;
} SweptRows;

/* Room for n_edges VM-exits: the edge, the time without waiting, the number in its thread. */
typedef struct {
	int64_t *edge, *work_ns, *number;
} SlowExits;

/* Find the sound pairs of a VM-exit and a VM-entry that took at least `least` without waiting and without `moved_ns` (of
 * each edge; NULL: 0). counted: VM-exits of n_threads threads so far. Returns how many there are, -1 if an edge is none
 * of the rows, or its thread none of n_threads.
 */
int64_t slow_exits(const EdgeView *edges, const SweptRows *rows, const int64_t *moved_ns, int64_t least,
		   int64_t *counted, int64_t n_threads, const SlowExits *out);

/* time_bins.c: stretches of time cut at the edges of bins */

/* Stretches: what a thread did, as a part, and values that are not negative; level: NULL where there is none. */
typedef struct {
	int64_t n;
	const int64_t *thread, *begin_ns, *dur_ns;
	const uint8_t *part;
	const int64_t *code, *cpu, *level;
} Stretches;

/* n_bins bins of each of n_threads threads, from time 0 on. part_ns: n_parts of each.
 * longest, cpu, level: of the longest piece in each bin its length, at most longest_ns, and, below it in `value_bits`
 * bits, the value.
 */
typedef struct {
	int64_t n_threads, n_bins, n_parts, bin_ns, longest_ns;
	int32_t value_bits;
	int64_t *part_ns, *longest, *cpu, *level;
} TimeBins;

/* Add the pieces of stretches to their bins. Returns -1 if a thread or part is none of the bins'. */
int64_t add_stretches(const Stretches *from, const TimeBins *bins);

/* perf_tables.c: the tables of `perf kvm stat` */

/* What an event is to perf; those from PERF_EXIT on have keys. PERF_ENTERS and PERF_LEAVES: entry and exit where perf
 * measures guest mode.
 */
enum { PERF_NOTHING, PERF_ENTRY, PERF_ENTERS, PERF_EXIT, PERF_PIO, PERF_MSR, PERF_MMIO_READ, PERF_MMIO_WRITE,
       PERF_KEY_ONLY, PERF_LEAVES };

/* Rows of a table. */
typedef struct {
	int64_t n_rows, n_kinds;
	const int64_t *ts;
	const int32_t *tid;
	const uint16_t *kind;
} PerfRows;

/* The events of a kind: what they are (all of them, or by `whats` each), and of those with keys the table (below 4)
 * and the key of each of n.
 */
typedef struct {
	uint8_t what, table;
	int64_t n;
	const uint8_t *whats;
	const uint64_t *keys;
} PerfKind;

/* What is kept of a thread that had a VM-entry: when its latest VM-exit was, 0 where an MMIO event followed; and of each
 * table whether a sample has begun (a bit of `pending`), when, and its key's number.
 */
typedef struct {
	int64_t exit_ns, begin_ns[4];
	int32_t number[4], pending;
} PerfThread;

/* Threads by their number from 1, which is found by thread id (n_tids); 0: none. n_known of n_threads are there. */
typedef struct {
	int64_t n_tids, n_threads;
	int32_t *number;
	PerfThread *state;
	int64_t *n_known;
} PerfThreads;

/* The samples of a key; all begin with 0. squares: about the mean. */
typedef struct {
	int64_t count, total, min_ns, max_ns;
	double mean, squares;
} PerfSums;

/* A table: the numbers of its keys, of which n_known are known, and as many sums as the key table has `known`. latest:
 * the number of the key that came last, -1 for none.
 */
typedef struct {
	KeyTable keys;
	int64_t n_known, latest;
	uint64_t latest_key;
	PerfSums *sums;
} PerfTable;

/* Take the rows from row `from` on; position: of each kind, how many of its events were taken. Returns up to which row
 * they were taken: that one has a key that is new, and the key table is half full. -1 if a kind is none of n_kinds, or
 * has more events than keys.
 */
int64_t take_perf_events(const PerfRows *rows, int64_t from, const PerfKind *kinds, int64_t *position,
			 const PerfThreads *threads, PerfTable *tables, uint64_t seed);

/* automaton.c: the model's states over sequences of events */

/* Step the transition table through a sequence: the state in which each event finds its thread, and for each step
 * (class 1..n_steps) its position, the state before and the table's verdict. next_state: n_steps + 1; verdicts: n_states
 * rows of n_steps + 1. Returns how many steps there are.
 */
int64_t take_steps(const uint8_t *cls, const uint8_t *first, const uint8_t *broken, int64_t n,
		   const uint8_t *next_state, const uint8_t *verdicts, int64_t n_steps, int32_t unknown,
		   uint8_t *state_out, int64_t *position, uint8_t *before, uint8_t *verdict);

/* Cut a sequence into segments, at events of the three boundary classes and where knowledge begins. Returns how many
 * there are; `of` gives each event's.
 */
int64_t cut_segments(const uint8_t *cls, const uint8_t *first, const uint8_t *broken, int64_t n,
		     const uint8_t *boundaries, int64_t *of, int64_t *start, uint8_t *kind, uint64_t *mask,
		     uint8_t *linked);

/* Count the steps by edge (state before, class) and by the log-linear bucket of the time since the step before:
 * 2^sub_bits buckets for each power of two. Steps from the unknown state and wrong ones do not count.
 */
void count_edges(const uint8_t *before, const uint8_t *cls, const uint8_t *wrong, const int64_t *ts, int64_t n,
		 int64_t n_classes, int32_t unknown, int32_t sub_bits, int64_t n_buckets, int64_t *counts);

/* round_numbers.c: what a vCPU does from one VM-entry to the next */

/* n values of `size` bytes, of the events of a class. */
typedef struct {
	const uint8_t *values;
	int64_t n, size;
} ClassColumn;

/* The n events of a sequence. place: of each among those of its kind. odd: a round with such an event, its first one
 * left out, is like no other. repeated: a thread's first event that was seen before. The columns of class c are those
 * from begin[c] up to begin[c + 1] (65 numbers).
 */
typedef struct {
	int64_t n;
	const uint8_t *cls, *first, *repeated, *odd;
	const int64_t *place;
	const ClassColumn *columns;
	const int64_t *begin;
} RoundEvents;

/* The contents that are known, by number: bytes at[i] .. at[i + 1] each, their hash; at[0] is 0. There is room for
 * `most` of them (at: most + 1) and n_bytes. slots: n_slots of them (a power of two), a number from 1 or 0.
 */
typedef struct {
	int64_t n_slots, most, n_bytes;
	uint64_t seed;
	int64_t *n_known, *at;
	int32_t *slots;
	uint64_t *hash;
	uint8_t *bytes;
} RoundTable;

/* Cut a sequence into rounds, from an event of class `entry` (of a thread's first events, one that is repeated) to the
 * next, which is in both; what stands before a thread's first, and behind its last, is one as well. Gives each its first
 * position, the one behind its last, and the number of its content, -1 if it is cut off, odd, longer than `longest`
 * events or there is no room. start, stop, number: n each. Returns how many there are, or -1 if a place is none of its
 * column's.
 */
int64_t number_rounds(const RoundEvents *events, int32_t entry, int64_t longest, const RoundTable *table, int64_t *start,
		      int64_t *stop, int32_t *number);

#endif
