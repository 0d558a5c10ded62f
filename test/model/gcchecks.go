package main

var gcProperties = []property{
	{"G1", "no point that exists refers to a record that no object holds"},
}

// Where nothing else is said there is one writer, one collection, one document. In all of them points are forgotten and
// sessions given up at any time, and writers abandon or die. Two collections have no locks.
// ONE_RECORD: packs and points have one record each, so nothing is compacted. TREE: points lead to
// records through nodes, which can turn out to be gone. ALL_CONDEMNED: documents condemn all packs, not any of them.
// SLOW_LISTINGS: what is listed is looked at one by one.
//
// The bounds are chosen so that these searches take a minute or two of processor time together.
var gcChecks = []check{
	{"a writer, a collection", nil, ""},
	{"a writer, a collection, two documents", []string{"DOCUMENTS=2"}, ""},
	{"two writers", []string{"WRITERS=2", "ONE_RECORD"}, ""},
	{"two collections", []string{"COLLECTIONS=2"}, ""},
	{"two collections, listings that take their time", []string{"COLLECTIONS=2", "ONE_RECORD", "SLOW_LISTINGS"}, ""},
	{"a writer, listings that take their time", []string{"SLOW_LISTINGS"}, ""},
	{"a writer whose parent can't be followed", []string{"TREE", "DOCUMENTS=2", "ALL_CONDEMNED"}, ""},
	{"two collections, what can't be followed", []string{"TREE", "WRITERS=0", "COLLECTIONS=2", "DOCUMENTS=2"}, ""},

	// What keeps nothing from being lost: said so that nobody believes that it does.
	{"a session whose parent is gone and can't be followed is passed over, not given up: its writer's own look is enough", []string{"TREE", "DOCUMENTS=2", "ALL_CONDEMNED", "ORPHANS_NOT_GIVEN_UP"}, ""},

	{"a writer does not look for condemned packs", []string{"CONDEMNED_NOT_LISTED"}, "G1"},
	{"a writer looks for them after it has listed packs", []string{"INDEX_LISTED_FIRST"}, "G1"},
	{"a writer does not look again whether its parent is there", []string{"PARENT_NOT_CHECKED_AGAIN"}, "G1"},
	{"a writer looks before it creates its session", []string{"SESSION_AFTER_CHECK"}, "G1"},
	{"a writer publishes although it was given up", []string{"NO_FENCE"}, "G1"},
	{"a collection does not wait for sessions", []string{"NO_WAIT"}, "G1"},
	{"a collection lists the sessions that it waits for before its document is there", []string{"WAIT_LISTED_FIRST"}, "G1"},
	{"a collection marks before it waits", []string{"MARKED_BEFORE_WAIT"}, "G1"},
	{"a collection does not mark from the parents of open sessions", []string{"OPEN_NOT_FOLLOWED"}, "G1"},
	{"a collection does not mark from the points of sessions that have ended", []string{"ENDED_NOT_FOLLOWED"}, "G1"},
	{"a collection marks from points after sessions", []string{"POINTS_AFTER_SESSIONS"}, "G1"},
	{"a collection goes on marking when what it follows is gone", []string{"TREE", "WRITERS=0", "COLLECTIONS=2", "DOCUMENTS=2", "NO_RESTART"}, "G1"},
	{"a collection does not look at its document after marking", []string{"COLLECTIONS=2", "ONE_RECORD", "NO_LOOK"}, "G1"},
	{"a collection deletes an old generation before it creates the next", []string{"OLD_DELETED_FIRST"}, "G1"},
	{"a collection deletes its document before what it condemns", []string{"DOCUMENT_DELETED_FIRST"}, "G1"},
	{"a document goes as soon as it is over, not a day later", []string{"COLLECTIONS=2", "ONE_RECORD", "NO_GRACE"}, "G1"},
	{"sessions are deleted while a document is in force", []string{"COLLECTIONS=2", "ONE_RECORD", "SESSIONS_DELETED_IN_FORCE"}, "G1"},
	{"it is seen that no document is in force before it is seen which sessions are over", []string{"COLLECTIONS=2", "ONE_RECORD", "FORCE_LOOKED_AT_FIRST"}, "G1"},
	{"what seems left over of a document is deleted without another look", []string{"COLLECTIONS=2", "ONE_RECORD", "LEFTOVERS_NOT_LOOKED_AT"}, "G1"},
}
